"""The kinds of folders that can be published, one file each."""
