"""Many runs beside each other: suites with their searches, and every combination tried out."""
