"""The commands and their options. The modules that the commands import, when they run, do the work."""
