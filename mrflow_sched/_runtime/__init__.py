"""What everything else stands on: errors, cancelling, devices, memory. Uses nothing of the package."""
