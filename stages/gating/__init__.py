"""The gate, in parts: evidence, statistics, five families of checks, the verdict, its report."""
