"""The engine: stages, runs, rounds, the ledger and the gateway. Knows no stage by name; finds them by entry point."""
