"""Where it runs: one file or folder per target; its name is the name of the target."""
