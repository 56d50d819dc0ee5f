"""The proof of what ran: a run's identity, its record, its trace, and the manifest beside the weights."""
