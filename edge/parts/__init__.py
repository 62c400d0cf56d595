"""What a part is on the line: triggers, numbers, deadlines."""
