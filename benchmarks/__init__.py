"""Programs that measure speed, memory and accuracy; each runs on its own."""
