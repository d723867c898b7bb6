//! What the engine says of nodes, told of their files: names of nodes mean nothing to whoever runs a command.

use std::time::Duration;

use blockyard_engine::engine::EngineHandle;
use blockyard_engine::error::EngineError;
use blockyard_engine::reply::Reply;
use blockyard_engine::request::Request;

/// How long names of files are waited for, which only make a message better.
const NAMES_WAIT: Duration = Duration::from_secs(2);

/// Sends a request.
///
/// # Errors
/// The engine's, about files.
pub(super) async fn call(engine: &EngineHandle, request: Request) -> Result<Reply, EngineError> {
    match engine.call(request).await {
        Ok(reply) => Ok(reply),
        Err(error) => {
            let text = naming(engine, Some(error.text)).await;
            Err(EngineError {
                text: text.unwrap_or_default(),
                ..error
            })
        }
    }
}

/// The same text about files, if there is one. Nodes that are not there any more are called what they were.
pub(super) async fn naming(engine: &EngineHandle, text: Option<String>) -> Option<String> {
    let text = text?;
    let has_nodes = ["node '", "Node '", "'#"];
    match has_nodes.iter().any(|mark| text.contains(mark)) {
        true => Some(naming_files(text, &files_of_nodes(engine).await)),
        false => Some(text),
    }
}

/// That something was lost when files were closed, and what.
pub(super) fn not_saved(lost: Vec<String>, files: &[(String, String)]) -> String {
    let lost = lost.into_iter().map(|text| naming_files(text, files));
    let lost: Vec<String> = lost.collect();
    format!(
        "not everything could be saved at the end: {}",
        lost.join("; ")
    )
}

/// The files that nodes show, by the names of the nodes; none if a disk does not answer.
pub(super) async fn files_of_nodes(engine: &EngineHandle) -> Vec<(String, String)> {
    let nodes = engine.call(Request::QueryNamedBlockNodes { flat: true });
    match tokio::time::timeout(NAMES_WAIT, nodes).await {
        Ok(Ok(Reply::Nodes(nodes))) => nodes
            .into_iter()
            .map(|node| (node.node_name, node.image.file().into_owned()))
            .collect(),
        _ => Vec::new(),
    }
}

fn naming_files(text: String, files: &[(String, String)]) -> String {
    let named = files
        .iter()
        .filter(|(node, file)| !file.is_empty() && !node.is_empty());
    named.fold(text, |text, (node, file)| {
        let file = format!("'{file}'");
        let text = text
            .replace(&format!("Node '{node}'"), &file)
            .replace(&format!("node '{node}'"), &file);
        match node.starts_with('#') {
            // Made up, so it is no file's name by chance.
            true => text.replace(&format!("'{node}'"), &file),
            false => text,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_are_called_by_their_files() {
        let files = [("#block1", "base"), ("overlay", "top"), ("null", "")];
        let files = files.map(|(node, file)| (node.to_owned(), file.to_owned()));
        for (text, expected) in [
            ("Node '#block1' is on node 'overlay'", "'base' is on 'top'"),
            ("Device '#block1' not found", "Device 'base' not found"),
            (
                "'overlay' is a file; node '#block12', node 'null'",
                "'overlay' is a file; node '#block12', node 'null'",
            ),
        ] {
            assert_eq!(naming_files(text.to_owned(), &files), expected);
        }
    }
}
