"""What is mounted into the model, whose it is, and what stays."""
