"""Models, data and objectives of the shipped recipes, written as a user would write his own."""
