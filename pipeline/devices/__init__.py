"""Where artifacts run: this machine, or another one over ssh or adb."""
