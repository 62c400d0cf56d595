"""New models on a running line: fetched, checked, tried beside the present one, switched to, and rolled back.

    broker ──> ReleaseFetcher ──> check ──> ModelManager ──> Shadow ──(agrees)──> switch ──> Canary ──(bad)──> roll back
                                                │
                                   ModelState (STATE/models/record.json): the last decision, before it takes effect

A line judges with what the state says, from the first part after a crash on.
"""
