"""Image sources: folders, files, videos, cameras, and generated boards.

locate ──> files, boards, video, camera, watched_folder
                          └──────┴──> child (a live camera is read in a process of its own)
"""
