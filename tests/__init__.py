"""FedSEA's tests. Before torch is loaded: on a busy machine, threads that spin while they wait cost the most."""

from fedsea.threads import let_idle_threads_sleep

let_idle_threads_sleep()
