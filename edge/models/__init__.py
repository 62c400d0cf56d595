"""Released models on a running line: fetched, checked, compared in a shadow run, switched to, and rolled back.

    broker ──> ReleaseFetcher ──> check ──> ModelManager ──> Shadow ──(agrees)──> switch ──> Canary ──(bad)──> roll back
                                                │
                                   ModelState (STATE/models/record.json): the last decision, before it takes effect

After a crash, the line inspects with the model that the state names, from the first part on.
"""
