"""What each row of the scorecard is proven by, and the mistakes that it must catch."""
