"""Returns the commands: each parses, calls, prints; heavy modules are imported when a command runs, not before."""
