"""The file for ms-swift's `--external_plugins`: it makes `swift sft` and `swift pt` train with defenses.

```
export SAFELORA_FAST=defenses.yaml
swift sft … --external_plugins "$(python -c 'import safelora_fast.trainers.ms_swift as s; print(s.PLUGIN)')"
```

or in a YAML file for `swift sft config.yaml`:

```yaml
external_plugins: [/path/to/safelora_fast/trainers/ms_swift/plugin.py]
ENV: {SAFELORA_FAST: defenses.yaml}
```

`defenses.yaml` has the sections `defenses:` and `monitors:` of a recipe. This file is in a folder of its own because ms-swift
puts that folder at the beginning of `sys.path`, where files named like libraries would hide them.
"""

from __future__ import annotations

from safelora_fast.trainers.ms_swift import install

install()
