"""Scorers: one answer in, one score a metric out; gate, nightly run and live traffic share them."""
