"""What measures speed, memory and accuracy; each file is a program of its own."""
