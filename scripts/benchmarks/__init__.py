"""Speed, memory, and what a kill leaves: measured by hand, not by the tests."""
