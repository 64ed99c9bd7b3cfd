"""What `moerouters bench` runs: times as ratios to a peer in the same run, since absolute ones say little elsewhere."""
