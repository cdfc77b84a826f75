"""magsd_export: from a trained checkpoint to a verified bundle. Research use only."""
