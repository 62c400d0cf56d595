"""Blobs (models, ledgers) from one machine to others in checked chunks, resumable on either side.

A blob is named by its SHA-256. Its sender announces a manifest (:class:`edgeflame.mqtt.messages.BlobManifest`); a
receiver answers with a bitmap of the chunks it lacks; the sender keeps a bounded window of chunks on their way;
further bitmaps acknowledge them or ask for repair; the whole is hashed before anyone may use it. A receiver that
lacks nothing says so, and nothing moves.

:class:`edgeflame.transfer.protocol.Sender` and :class:`edgeflame.transfer.protocol.Receiver` hold no socket, no
file and no clock. An upload is one receiver; a download of the global model is one sender and many receivers, each
chunk published once for all. Whoever wants the blob moved keeps the timers: a site offers its update again, or asks
again for what it lacks, when nothing has progressed for a while; the aggregator only answers. A message lost,
doubled, late or damaged therefore costs time and nothing else.

:mod:`edgeflame.transfer.store` keeps blobs and unfinished ones on disk; :mod:`edgeflame.transfer.compression`
encodes updates in fewer bytes.
"""
