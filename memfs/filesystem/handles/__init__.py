"""The open files of a mount: what each kind of them does, and the table that they are in."""
