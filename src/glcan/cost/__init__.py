"""What a step costs: estimated before anything runs, and metered."""
