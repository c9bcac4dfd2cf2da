"""The scorecard of reliability: `python -m tests.reliability`."""
