//! Nodes that change while they are in use: opened for writing by a command that needs it, and read-only again after it; put
//! below an overlay; opened with other options and on other nodes.

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

#[test]
fn nodes_are_opened_with_other_options_and_on_other_nodes() {
    let script = r#"
        $ for i in base mid y; do qemu-img create -q -f qcow2 $i.qcow2 1M; done
        $ qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 y.qcow2; truncate -s 1M r.img
        {"execute": "blockdev-reopen", "arguments": {}}
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "base", "file": {"driver": "file", "filename": "base.qcow2"}}}
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "mid", "file": {"driver": "file", "filename": "mid.qcow2"},"backing": "base"}}
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "y", "file": {"driver": "file", "filename": "y.qcow2"},"backing":null}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "qcow2", "file": {"driver": "file", "filename": "base.qcow2"}}]}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "qcow2", "node-name": "nope", "file": {"driver": "file", "filename": "base.qcow2"}}]}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "qcow2", "node-name": "base", "file": {"driver": "file", "filename": "base.qcow2"}}]}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "raw", "node-name": "base", "file": {"driver": "file", "filename": "base.qcow2"}}]}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "qcow2", "node-name": "base", "file": {"driver": "file", "filename": "other.qcow2"}}]}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "qcow2", "node-name": "base", "file": {"driver": "file", "filename": "base.qcow2", "aio": "native"}}]}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "qcow2", "node-name": "base", "file": {"driver": "file", "filename": "base.qcow2", "locking": "off"}}]}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "qcow2", "node-name": "base", "file": {"driver": "host_device", "filename": "base.qcow2"}}]}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "qcow2", "node-name": "base", "file": {"driver": "file", "filename": "base.qcow2", "node-name": "foo"}}]}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "qcow2", "node-name": "base", "file": "nope"}]}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "qcow2", "node-name": "mid", "file": {"driver": "file", "filename": "mid.qcow2"}}]}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "qcow2", "node-name": "mid", "file": {"driver": "file", "filename": "mid.qcow2"},"backing": {"driver": "qcow2", "file": {"driver": "file", "filename": "base.qcow2"}}}]}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "qcow2", "node-name": "mid", "file": {"driver": "file", "filename": "mid.qcow2"},"backing": "mid"}]}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "qcow2", "node-name": "base", "file": {"driver": "file", "filename": "base.qcow2"},"backing": "mid"}]}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "qcow2", "node-name": "mid", "file": {"driver": "file", "filename": "mid.qcow2"},"backing": "nope"}]}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "qcow2", "node-name": "y", "file": {"driver": "file", "filename": "y.qcow2"}}]}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "qcow2", "node-name": "y", "file": {"driver": "file", "filename": "y.qcow2"},"backing":null}]}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "qcow2", "node-name": "mid", "file": {"driver": "file", "filename": "mid.qcow2"},"backing":null}]}}
        {"execute": "query-named-block-nodes", "arguments": {"flat": true}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "qcow2", "node-name": "mid", "file": {"driver": "file", "filename": "mid.qcow2"}}]}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "qcow2", "node-name": "mid", "read-only":true,"cache": {"direct":true,"no-flush":true},"discard": "unmap", "detect-zeroes": "unmap", "file": {"driver": "file", "filename": "mid.qcow2"},"backing": "base", "lazy-refcounts":true}]}}
        {"execute": "query-named-block-nodes", "arguments": {"flat": true}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "qcow2", "node-name": "mid", "file": {"driver": "file", "filename": "mid.qcow2"},"backing": "base"}]}}
        {"execute": "query-named-block-nodes", "arguments": {"flat": true}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "qcow2", "node-name": "mid", "read-only":true,"file": {"driver": "file", "filename": "mid.qcow2"},"backing": "base"},{"driver": "qcow2", "node-name": "base", "read-only":true,"file": {"driver": "file", "filename": "bad.qcow2"}}]}}
        {"execute": "query-named-block-nodes", "arguments": {"flat": true}}
        {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "rf", "filename": "r.img"}}
        {"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "raw", "file": "rf"}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "raw", "node-name": "raw", "file": "rf", "size":512}]}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "raw", "node-name": "raw", "file": "rf", "offset":512}]}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "raw", "node-name": "raw", "file": "rf", "offset":5120000}]}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "raw", "node-name": "raw", "file": "rf", "offset":512,"size":5120000}]}}
        {"execute": "query-named-block-nodes", "arguments": {"flat":true}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "raw", "node-name": "raw", "file": "rf", "read-only":true},{"driver": "file", "node-name": "rf", "filename": "r.img", "read-only":true}]}}
        {"execute": "query-named-block-nodes", "arguments": {"flat": true}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "raw", "node-name": "raw", "file": "rf"}]}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "raw", "node-name": "raw", "file": "rf"},{"driver": "file", "node-name": "rf", "filename": "r.img"}]}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "file", "node-name": "rf", "filename": "r2.img"}]}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "file", "node-name": "rf", "filename": "r.img", "auto-read-only":true}]}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "file", "node-name": "rf", "filename": "r.img", "cache": {"direct":true}}]}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "file", "node-name": "rf", "filename": "r.img", "force-share":true}]}}
        {"execute": "query-named-block-nodes", "arguments": {"flat": true}}
        {"execute": "blockdev-add", "arguments": {"driver": "null-co", "node-name": "null", "size":1048576}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "null-co", "node-name": "null", "size":1048576}]}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "null-co", "node-name": "null", "size":1048576,"read-only":true}]}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "null-co", "node-name": "null", "size":2097152,"read-only":true}]}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "null-co", "node-name": "null", "read-only":true}]}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "raw", "node-name": "raw", "file": "null"}]}}
        {"execute": "query-named-block-nodes", "arguments": {"flat": true}}
        {"execute": "blockdev-add", "arguments": {"driver": "blkdebug", "node-name": "bd", "image": "null"}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "blkdebug", "node-name": "bd", "image": "null", "read-only":true}]}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "blkdebug", "node-name": "bd", "image": "rf"}]}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "blkdebug", "node-name": "bd", "image": "null", "align":512}]}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "qcow2", "node-name": "base", "file": {"driver": "file", "filename": "base.qcow2"},"l2-cache-size":70000,"cache-clean-interval":0,"overlap-check": "all"}]}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "qcow2", "node-name": "base", "file": {"driver": "file", "filename": "base.qcow2"},"l2-cache-size":7000000,"cache-size":4096}]}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "qcow2", "node-name": "base", "file": {"driver": "file", "filename": "base.qcow2"},"data-file": "rf"}]}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "qcow2", "node-name": "base", "file": {"driver": "file", "filename": "base.qcow2"},"encrypt": {"format": "luks", "key-secret": "x"}}]}}
        locks base.qcow2
        locks mid.qcow2
        locks r.img
        $ qemu-img check -q base.qcow2
    "#;
    compare(script, |_| ());
}

/// What was said of a node and means nothing to the driver is told of first.
#[test]
fn a_driver_stays() {
    let script = r#"
        $ truncate -s 1M r.img; qemu-img create -q -f qcow2 a.qcow2 1M
        {"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "f", "filename": "r.img"}}
        {"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "raw", "offset": 512, "file": "f"}}
        {"execute": "blockdev-add", "arguments": {"driver": "null-co", "node-name": "null", "size": 1048576}}
        {"execute": "blockdev-add", "arguments": {"driver": "null-co", "node-name": "plain"}}
        {"execute": "blockdev-add", "arguments": {"driver": "blkdebug", "node-name": "bd", "image": "null", "align": 512}}
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "a", "lazy-refcounts": true, "file": {"driver": "file", "node-name": "af", "filename": "a.qcow2"}}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "raw", "node-name": "f", "file": "null"}]}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "host_device", "node-name": "f", "filename": "r.img"}]}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "null-co", "node-name": "f"}]}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "qcow2", "node-name": "af", "file": "f"}]}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "raw", "node-name": "null", "file": "f"}]}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "file", "node-name": "null", "filename": "r.img"}]}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "null-aio", "node-name": "null", "size": 1048576}]}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "null-aio", "node-name": "null"}]}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "null-aio", "node-name": "plain"}]}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "raw", "node-name": "bd", "file": "null"}]}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "raw", "node-name": "a", "file": "af"}]}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "copy-on-read", "node-name": "raw", "file": "f"}]}}
        {"execute": "query-named-block-nodes", "arguments": {"flat": true}}
    "#;
    compare(script, |_| ());
}

#[test]
fn locks_follow_what_a_node_is_opened_for() {
    let script = r#"
        $ qemu-img create -q -f qcow2 a.qcow2 1M
        $ qemu-io -f qcow2 -c 'write -P 3 0 64k' a.qcow2 > /dev/null
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "a", "file": {"driver": "file", "filename": "a.qcow2"}}}
        locks a.qcow2
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "qcow2", "node-name": "a", "read-only": true, "file": {"driver": "file", "filename": "a.qcow2"}}]}}
        locks a.qcow2
        $ qemu-img check -q a.qcow2
        $ qemu-io -r -f qcow2 -c 'read -P 3 0 64k' a.qcow2 > /dev/null
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "qcow2", "node-name": "a", "lazy-refcounts": true, "file": {"driver": "file", "filename": "a.qcow2"}}]}}
        locks a.qcow2
        {"execute": "block_resize", "arguments": {"node-name": "a", "size": 2097152}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "qcow2", "node-name": "a", "read-only": true, "file": {"driver": "file", "filename": "a.qcow2"}}]}}
        $ qemu-img check -q a.qcow2
        {"execute": "block_resize", "arguments": {"node-name": "a", "size": 1048576}}
        {"execute": "query-named-block-nodes", "arguments": {"flat": true}}
    "#;
    compare(script, |_| ());
}

#[test]
fn an_overlay_takes_the_users_of_its_node() {
    let script = r#"
        $ for i in base ov ov3 a b c; do qemu-img create -q -f qcow2 $i.qcow2 1M; done
        $ qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 ov2.qcow2; truncate -s 1M r.img
        {"execute": "blockdev-snapshot", "arguments": {"node": "nope", "overlay": "nope2"}}
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "base", "file": {"driver": "file", "filename": "base.qcow2"}}}
        {"execute": "blockdev-snapshot", "arguments": {"node": "base", "overlay": "nope2"}}
        {"execute": "blockdev-snapshot", "arguments": {"node": "base", "overlay": ""}}
        {"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "raw", "file": {"driver": "file", "filename": "r.img", "node-name": "rf"}}}
        {"execute": "blockdev-add", "arguments": {"driver": "null-co", "node-name": "null"}}
        {"execute": "blockdev-add", "arguments": {"driver": "blkdebug", "node-name": "bd", "image": "null"}}
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "ov", "file": {"driver": "file", "filename": "ov.qcow2"}, "backing": null}}
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "ov3", "file": {"driver": "file", "filename": "ov3.qcow2"}, "read-only": true}}
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "ov2", "file": {"driver": "file", "filename": "ov2.qcow2"}, "backing": {"driver": "qcow2", "file": {"driver": "file", "filename": "base.qcow2", "locking": "off"}, "force-share": true, "read-only": true}}}
        {"execute": "blockdev-snapshot", "arguments": {"node": "base", "overlay": "raw"}}
        {"execute": "blockdev-snapshot", "arguments": {"node": "base", "overlay": "rf"}}
        {"execute": "blockdev-snapshot", "arguments": {"node": "base", "overlay": "null"}}
        {"execute": "blockdev-snapshot", "arguments": {"node": "base", "overlay": "bd"}}
        {"execute": "blockdev-snapshot", "arguments": {"node": "base", "overlay": "ov2"}}
        {"execute": "blockdev-snapshot", "arguments": {"node": "base", "overlay": "base"}}
        {"execute": "blockdev-snapshot", "arguments": {"node": "rf", "overlay": "ov"}}
        locks r.img
        {"execute": "blockdev-snapshot", "arguments": {"node": "base", "overlay": "ov3"}}
        locks base.qcow2
        {"execute": "query-named-block-nodes", "arguments": {"flat": true}}
        {"execute": "x-debug-query-block-graph"}
        {"execute": "blockdev-snapshot", "arguments": {"node": "base", "overlay": "ov"}}
        {"execute": "blockdev-snapshot", "arguments": {"node": "base", "overlay": "nope"}}
        {"execute": "blockdev-snapshot", "arguments": {"node": "ov", "overlay": "base"}}
        {"execute": "blockdev-snapshot", "arguments": {"node": "base", "overlay": "ov3"}}
        {"execute": "blockdev-snapshot", "arguments": {"node": "raw", "overlay": "ov3"}}
        {"execute": "blockdev-del", "arguments": {"node-name": "base"}}
        {"execute": "blockdev-del", "arguments": {"node-name": "ov"}}
        {"execute": "blockdev-del", "arguments": {"node-name": "ov3"}}
        {"execute": "query-named-block-nodes", "arguments": {"flat": true}}
        $ qemu-img check -q ov3.qcow2; qemu-img check -q -U ov.qcow2; qemu-img check -q -U base.qcow2
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "a", "file": {"driver": "file", "filename": "a.qcow2"}}}
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "b", "file": {"driver": "file", "filename": "b.qcow2"}}}
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "c", "file": {"driver": "file", "filename": "c.qcow2"}}}
        {"execute": "blockdev-mirror", "arguments": {"job-id": "m", "device": "a", "target": "b", "sync": "full"}}
        wait m ready
        {"execute": "blockdev-snapshot", "arguments": {"node": "a", "overlay": "c"}}
        {"execute": "blockdev-snapshot", "arguments": {"node": "c", "overlay": "a"}}
        {"execute": "blockdev-snapshot", "arguments": {"node": "c", "overlay": "b"}}
        {"execute": "block-job-cancel", "arguments": {"device": "m", "force": true}}
        wait m null
        {"execute": "x-debug-query-block-graph"}
        {"execute": "blockdev-snapshot", "arguments": {"node": "b", "overlay": "a"}}
        locks a.qcow2
        locks b.qcow2
        locks c.qcow2
        {"execute": "x-debug-query-block-graph"}
        {"execute": "x-blockdev-change", "arguments": {"parent": "a", "child": "file"}}
        {"execute": "x-blockdev-change", "arguments": {"parent": "a", "child": "nope"}}
        {"execute": "x-blockdev-change", "arguments": {"parent": "a", "node": "base"}}
        {"execute": "x-blockdev-change", "arguments": {"parent": "a", "node": "nope"}}
        {"execute": "x-blockdev-change", "arguments": {"parent": "nope", "node": "nope"}}
        {"execute": "x-blockdev-change", "arguments": {"parent": "a"}}
        {"execute": "x-blockdev-change", "arguments": {"parent": "a", "node": "base", "child": "file"}}
        {"execute": "x-blockdev-change", "arguments": {}}
    "#;
    compare(script, |_| ());
}

#[test]
fn links_that_a_job_relies_on_stay() {
    let script = r#"
        $ qemu-io -f qcow2 -c 'write -P 3 0 512k' mid.qcow2 > /dev/null
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "mid", "backing": "base", "read-only": true, "file": {"driver": "file", "filename": "mid.qcow2"}}}
        {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "top", "backing": "mid", "file": {"driver": "file", "filename": "top.qcow2"}}}
        {"execute": "block-stream", "arguments": {"job-id": "s", "device": "top", "base-node": "base", "speed": 1}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "qcow2", "node-name": "top", "backing": "base", "file": {"driver": "file", "filename": "top.qcow2"}}]}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "qcow2", "node-name": "top", "backing": null, "file": {"driver": "file", "filename": "top.qcow2"}}]}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "qcow2", "node-name": "top", "backing": "mid", "read-only": true, "file": {"driver": "file", "filename": "top.qcow2"}}]}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "qcow2", "node-name": "top", "backing": "mid", "file": {"driver": "file", "filename": "top.qcow2"}}]}}
        {"execute": "block-job-cancel", "arguments": {"device": "s", "force": true}}
        wait s null
        {"execute": "block-commit", "arguments": {"job-id": "c", "device": "top", "top-node": "mid", "base-node": "base", "speed": 1}}
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "qcow2", "node-name": "top", "backing": "base", "file": {"driver": "file", "filename": "top.qcow2"}}]}}
        {"execute": "block-job-cancel", "arguments": {"device": "c", "force": true}}
        wait c null
        {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "qcow2", "node-name": "top", "backing": "base", "file": {"driver": "file", "filename": "top.qcow2"}}]}}
        {"execute": "blockdev-del", "arguments": {"node-name": "mid"}}
        {"execute": "x-debug-query-block-graph"}
    "#;
    compare(&format!("{CHAIN}{script}"), |_| ());
}
