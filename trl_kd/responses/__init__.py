"""What a response is: which tokens of a conversation are the model's own words, and how they end."""
