"""The federation: many data owners, one set of adapters, on Flower.

    coordinator's machine                                 a data owner's machine, one of several

    fedsea federation up  (coordinator/up.py)             fedsea federation join  (owner/join.py)
      │ starts, watches, restarts                           │ starts, watches, restarts
      ├─ SuperLink  (flower/superlink.py)  <── TLS ──>      ├─ SuperNode  (flower/supernode.py)
      │    │ starts for a run                  messages     │    │ starts for each message
      │  ServerApp  (flower/server_app.py)                  │  ClientApp  (flower/client_app.py): thin, no torch
      │    │ opens rounds, takes averages                   │    │ Unix socket: JSON and safetensors
      │    v                                                │    v
      └─ block server  (fedsea serve)  <── mTLS ──────────  └─ worker  (owner/worker_process.py): model and data, warm
                                 hidden states, gradients

Through Flower go, each round: to a client its ticket for a seat at a block server, the recipe, and A's and C's adapter;
back, the trained adapter and metrics. Hidden states and gradients go from worker to block server and nowhere else. The
middle's adapter goes from the block server to the ServerApp, averaged.

coordinator/  what runs at the coordinator: servers, rounds, clients, their replies, the folder of results
owner/        what runs at a data owner: worker, data, model, the adapter that stays private
flower/       what Flower loads and starts: the app's two halves, the strategy, the patches of its own processes
"""
