"""The operator's page, and what machines ask the daemon: metrics, health.

OutboxWriter ──> PartHistory (what is shown now) ──> OperatorPage ──> server (starlette on uvicorn, a thread)
            └──> LineMetrics (Prometheus) ────────────┘
"""
