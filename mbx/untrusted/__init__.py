"""What stands between a stranger's file and this machine."""
