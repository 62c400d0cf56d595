"""The round state machine, server strategies, the journal and the aggregation service."""
