"""Personal data and secrets in a text: pure functions, no thresholds, no models.

The same recognisers judge documents (stages/defects) and guard requests (serving/gateway/guards).
"""
