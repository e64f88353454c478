"""The cluster trainer: trees trained by OpenRLHF's actors on Ray, vLLM engines and DeepSpeed.

OpenRLHF's own entry point runs, with its flags and its placement of actors; some of its classes are replaced (`install`):

| OpenRLHF | here | what differs |
|---|---|---|
| agent executor | `executor.TreeExecutor` | one call grows one whole tree with ramet's runtime on the engine |
| `RolloutRayActor` | `actors.TreeRollout` | weights change during sampling; tokens carry weight versions |
| `SamplesGenerator`, `RemoteExperienceMaker` | `samples.TreeSamples`, `experience.TreeExperience` | ramet's advantages and rows |
| `PolicyModelActor`, `CriticModelActor` | `actors.TreePolicy`, `actors.TreeCritic` | ramet's loss; fixed number of steps, buckets |
| `WorkerWrap` | `worker.BucketWorker` | receives weights in buckets |
| `PPOTrainer` | `trainer.TreeTrainer` | the loop, the run folder, resuming |

The rest of ramet imports only the settings of this package, unless a run asks for the cluster trainer.
"""

import os

if os.environ.get("RAMET_OPENRLHF_CPU"):
    from ramet.policy.openrlhf import cpu

    cpu.without_flash_attention()
