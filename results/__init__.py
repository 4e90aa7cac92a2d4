"""Tables and pictures of the project's own runs, and what makes them."""
