//! Nodes that change while they are in use: opened for writing by a command that needs it, and read-only again after it.

use crate::oracle::compare;

/// A chain of two images that are open for reading only below one that is not.
const CHAIN: &str = r#"
    $ qemu-img create -q -f qcow2 base.qcow2 1M
    $ qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 mid.qcow2
    $ qemu-img create -q -f qcow2 -b mid.qcow2 -F qcow2 top.qcow2
    {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "base", "read-only": true, "file": {"driver": "file", "filename": "base.qcow2"}}}
"#;

#[test]
fn a_header_below_an_overlay_is_written_although_its_node_is_read_only() {
    let script = r#"
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "mid", "read-only": true, "backing": "base", "file": {"driver": "file", "filename": "mid.qcow2"}}}
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "top", "backing": "mid", "file": {"driver": "file", "filename": "top.qcow2"}}}
        locks mid.qcow2
        {"execute": "change-backing-file", "arguments": {"device": "top", "image-node-name": "mid", "backing-file": "other"}}
        locks mid.qcow2
        {"execute": "query-named-block-nodes", "arguments": {"flat": true}}
        $ qemu-img info -U mid.qcow2 | grep '^backing'
        $ qemu-img check -q mid.qcow2
        # Somebody else has the image open.
        $ qemu-io -r -f qcow2 -c 'read 0 512' -c 'sleep 1' -U mid.qcow2 > /dev/null
        {"execute": "blockdev-del", "arguments": {"node-name": "top"}}
        {"execute": "blockdev-del", "arguments": {"node-name": "mid"}}
        # What is described with it follows it, but for what its client says.
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "mid", "read-only": true, "backing": "base", "file": {"driver": "file", "filename": "mid.qcow2", "read-only": true}}}
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "top", "backing": "mid", "file": {"driver": "file", "filename": "top.qcow2"}}}
        {"execute": "change-backing-file", "arguments": {"device": "top", "image-node-name": "mid", "backing-file": "third"}}
        locks mid.qcow2
        {"execute": "blockdev-del", "arguments": {"node-name": "top"}}
        {"execute": "blockdev-del", "arguments": {"node-name": "mid"}}
        # What is named follows nobody, whether it could be written or not.
        {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "f", "read-only": true, "filename": "mid.qcow2"}}
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "mid", "read-only": true, "backing": "base", "file": "f"}}
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "top", "backing": "mid", "file": {"driver": "file", "filename": "top.qcow2"}}}
        {"execute": "change-backing-file", "arguments": {"device": "top", "image-node-name": "mid", "backing-file": "third"}}
        {"execute": "blockdev-del", "arguments": {"node-name": "top"}}
        {"execute": "blockdev-del", "arguments": {"node-name": "mid"}}
        {"execute": "blockdev-del", "arguments": {"node-name": "f"}}
        {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "f", "filename": "mid.qcow2"}}
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "mid", "read-only": true, "backing": "base", "file": "f"}}
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "top", "backing": "mid", "file": {"driver": "file", "filename": "top.qcow2"}}}
        {"execute": "change-backing-file", "arguments": {"device": "top", "image-node-name": "mid", "backing-file": "third"}}
        locks mid.qcow2
        $ qemu-img info -U mid.qcow2 | grep '^backing'
        $ qemu-img check -q mid.qcow2
    "#;
    compare(&format!("{CHAIN}{script}"), |_| ());
}
