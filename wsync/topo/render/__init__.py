"""What monitoring systems read of a report, and pictures for people. Pure: values in, text or bytes out.

`summary` counts and names, `health` says which device and which pair a finding concerns; `nagios`, `prometheus` and
`junit` write text. Pictures: `layout` sorts a machine's parts into frames and groups, `panel` and `links` draw one
machine, `fleet` many, `picture` chooses; they make a `scene` of shapes, which `svg` and `png` write.
"""
