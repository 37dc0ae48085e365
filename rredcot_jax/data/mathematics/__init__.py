"""Mathematical answers: text becomes tokens (latex), a tree (expressions), and is judged for its form and its value."""
