"""What hostile input, faults and signals do to the package, as counts."""
