"""What the benches measure in a process of their own."""
