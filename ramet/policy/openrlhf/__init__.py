"""The cluster trainer: trees trained by OpenRLHF's actors on Ray, vLLM engines and DeepSpeed.

OpenRLHF's own entry point runs, with its flags and placement; classes of ours stand in the places of
its own (`install`):

| OpenRLHF | here | what differs |
|---|---|---|
| agent executor | `executor.TreeExecutor` | one call grows one whole tree with our runtime on the engine |
| `RolloutRayActor` | `actors.TreeRollout` | weights change under way; tokens carry versions |
| `SamplesGenerator`, `RemoteExperienceMaker` | `samples.TreeSamples`, `experience.TreeExperience` | trees by task, our credit and rows |
| `PolicyModelActor`, `CriticModelActor` | `actors.TreePolicy`, `actors.TreeCritic` | our loss; a fixed number of steps; weights by bucket |
| `WorkerWrap` | `worker.BucketWorker` | takes weights in buckets |
| `PPOTrainer` | `trainer.TreeTrainer` | the loop, the run folder, resuming |

The rest of ramet imports the settings; nothing else here unless the engine is asked for.
"""

import os

if os.environ.get("RAMET_OPENRLHF_CPU"):
    from ramet.policy.openrlhf import cpu

    cpu.without_flash_attention()
