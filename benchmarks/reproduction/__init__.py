"""The paper's experiments as a plan of resumable runs: ../reproduce.py is the command."""
