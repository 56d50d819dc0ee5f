"""Where the package meets its user and the disk: files, paths, secrets, and errors in words."""
