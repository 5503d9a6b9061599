"""What sparse methods save and cost, measured on the embedded model: `python -m bench.methods`."""
