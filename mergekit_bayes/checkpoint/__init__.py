"""Models, adapters and precisions on disk, known by their headers and read block by block.

    dtypes       element types, as safetensors headers name them
    files        opening one file, its JSON, and outside text in messages
    header       the header of one safetensors file
    shards       a single file, or an index and its shards
    index        a model folder
    reference    `model@revision+adapter` and where it lies
    adapter      a PEFT LoRA adapter folder; adapter_config what is plain LoRA; orientation how weights are stored
    sidecar      the precisions beside a checkpoint, and in sidecar_metadata what they mean, in
                 kronecker_tensors how factors are stored
    initial      where modules that a base has not started from
    provenance   what a file of weights says about its base, its labels and its model's class
    fingerprint  which weights these are, without reading all of them
    reader       blocks of tensors from disk
    layout       where every tensor of an output goes
    writer       blocks of tensors to disk
    tensors      whole tensors to one file and back
    output       the output folder: published whole or not at all; its parts are
                 placement (may it go there), lock, work (where it is prepared) and journal (what is finished)
    disk         durable files, free space, and readable system errors

Everything but reading and writing blocks works without importing torch.
"""
