"""The `loongjax` command."""
