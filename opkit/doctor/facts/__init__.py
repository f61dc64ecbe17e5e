"""What is asked of the machine, as plain data; nothing here is judged."""
