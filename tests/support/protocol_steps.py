"""The table of the protocol's steps, in the order of a run of two sites, two rounds and shared statistics.

``fault_injector.py`` says what each name stands for. ``test_the_table_is_complete`` holds the table against what a run
does: a new step of the protocol fails the suite until it is in here.
"""

from __future__ import annotations

AGGREGATOR = (
    "journalling run_started",
    "announcing waiting",
    "hearing hello",
    "telling welcome",
    "hearing heartbeat-not-ready",
    "hearing heartbeat-ready",
    "journalling site_joined",
    "journalling site_joined source_chosen",
    "announcing initialise",
    "hearing offer-initial-0",
    "telling need",
    "storing a chunk",
    "completing a blob",
    "journalling initial_accepted round_started-update-1",
    "announcing train-1",
    "telling receipt-initial-0",
    "hearing offer-update-1",
    "journalling update_accepted-update-1",
    "telling receipt-update-1",
    "journalling update_accepted-update-1 round_closed-update-1",
    "making model 1",
    "adding a blob",
    "journalling model_made-1 round_started-update-2",
    "announcing train-2",
    "pruning blobs",
    "hearing need",
    "hearing offer-update-2",
    "journalling update_accepted-update-2",
    "telling receipt-update-2",
    "journalling update_accepted-update-2 round_closed-update-2",
    "making model 2",
    "journalling model_made-2 round_started-statistics-0",
    "announcing statistics",
    "hearing offer-statistics-0",
    "journalling update_accepted-statistics-0",
    "telling receipt-statistics-0",
    "journalling update_accepted-statistics-0 round_closed-statistics-0",
    "pooling",
    "journalling statistics_made",
    "announcing finish",
    "hearing finished",
    "journalling site_finished",
    "telling receipt-finish-0",
    "journalling site_finished run_ended",
    "announcing done",
    "writing results",
)
SITE = (
    "saying hello",
    "hearing waiting",
    "prepare",
    "hearing welcome",
    "saying heartbeat-not-ready",
    "done prepare",
    "store_initial",
    "writing .initial.canonical.draft",
    "adding a blob",
    "writing initial.json",
    "saying heartbeat-ready",
    "hearing initialise",
    "offerinitial",
    "saying offer-initial-0",
    "hearing need",
    "sending a chunk",
    "hearing train-1",
    "train-1",
    "hearing receipt-initial-0",
    "done train-1",
    "writing .private.canonical.draft",
    "store_update",
    "writing update.safetensors",
    "writing outcome.json",
    "offerupdate-1",
    "saying offer-update-1",
    "hearing receipt-update-1",
    "hearing train-2",
    "fetch",
    "pruning blobs",
    "saying need",
    "storing a chunk",
    "completing a blob",
    "train-2",
    "done train-2",
    "offerupdate-2",
    "saying offer-update-2",
    "hearing receipt-update-2",
    "hearing statistics",
    "gather",
    "done gather",
    "store_statistics",
    "writing statistics.safetensors",
    "offerstatistics",
    "saying offer-statistics-0",
    "hearing receipt-statistics-0",
    "hearing finish",
    "finish",
    "done finish",
    "store_finished",
    "writing finish.json",
    "report",
    "saying finished",
    "hearing receipt-finish-0",
)
STEPS = {"aggregator": AGGREGATOR, "site": SITE}

# Being killed right after one of these differs from being killed before the next: something is on disk, or on its
# way, that nobody has acted upon. The second chunk, blob or update is another situation than the first.
LASTING = ("journalling", "storing", "completing", "adding", "writing", "making", "pooling", "saying offer", "store_")
REPEATED = ("storing a chunk", "completing a blob", "adding a blob", "sending a chunk")

KILLS = [
    (role, moment)
    for role, steps in STEPS.items()
    for step in steps
    for moment in (
        f"before {step}",
        *([f"after {step}"] if step.startswith(LASTING) else []),
        *([f"before {step}#2"] if step in REPEATED and (role, step) != ("site", "adding a blob") else []),
    )
]

# What passes through the broker: it dies while one of its clients is at such a step.
PASSING = ("announcing", "telling", "hearing", "storing", "saying", "sending")
BROKER_KILLS = [(role, f"before {step}") for role, steps in STEPS.items() for step in steps if step.startswith(PASSING)]

# One of each kind: for every run of the test suite.
REPRESENTATIVE = {
    ("kill", "aggregator", "before storing a chunk#2", "embedded"),
    ("kill", "aggregator", "after journalling update_accepted-update-1 round_closed-update-1", "mosquitto"),
    ("kill", "site", "after writing update.safetensors", "embedded"),
    ("broker", "site", "before saying offer-update-1", "mosquitto"),
}
