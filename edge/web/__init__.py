"""The operator's page, and what machines ask the daemon: metrics, health.

Writer ──> Board (what is shown now) ──> app (starlette) ──> server (uvicorn, a thread)
└─> LineMetrics (Prometheus)  ──┘
"""
