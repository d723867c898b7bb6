//! `transaction`: an action is a command's name and its arguments, and is read as the command is.

use blockyard_engine::request::{Request, TransactionAction};

use crate::commands::{Action, Command, call, table};
use crate::error::QmpError;
use crate::schema::fields::Fields;
use crate::schema::transaction::TRANSACTION;

pub(super) static COMMANDS: &[Command] = &[Command::act("transaction", &TRANSACTION, transaction)];

fn transaction(mut a: Fields) -> Result<Action, QmpError> {
    let properties = a.object("properties");
    let modes = [("individual", false), ("grouped", true)];
    let grouped = properties.and_then(|properties| properties.word("completion-mode", &modes));
    let grouped = grouped.unwrap_or(false);
    let actions: Vec<(String, Fields)> = a
        .objects("actions")
        .into_iter()
        .map(|mut action| {
            let name = action.required_text("type");
            (name, action.object("data").unwrap_or_default())
        })
        .collect();
    if grouped && let Some((name, _)) = actions.iter().find(|(name, _)| !is_job(name)) {
        return Err(QmpError::generic(format!(
            "Action '{name}' does not support transaction property completion-mode = grouped"
        )));
    }
    let actions = actions.into_iter().map(|(name, data)| action(&name, data));
    call(Request::Transaction {
        actions: actions.collect::<Result<_, _>>()?,
        grouped,
    })
}

fn is_job(name: &str) -> bool {
    matches!(
        name,
        "blockdev-backup" | "drive-backup" | "blockdev-mirror" | "block-commit" | "block-stream"
    )
}

/// Reads one action as the command of its name.
fn action(name: &str, data: Fields) -> Result<TransactionAction, QmpError> {
    if name == "abort" {
        return Ok(TransactionAction::Abort);
    }
    let command = table().find(|command| command.name == name);
    let read = command.map(|command| (command.read)(data)).transpose()?;
    let Some(Action::Call(request)) = read else {
        return Err(not_an_action(name));
    };
    Ok(match *request {
        Request::ChangeBitmap(change) => TransactionAction::ChangeBitmap(change),
        Request::BlockdevSnapshot { node, overlay } => {
            TransactionAction::BlockdevSnapshot { node, overlay }
        }
        Request::NewOverlay(spec) => TransactionAction::NewOverlay(spec),
        Request::CreateInternalSnapshot { device, name } => {
            TransactionAction::CreateInternalSnapshot { device, name }
        }
        Request::StartJob(job) => job.into(),
        _ => return Err(not_an_action(name)),
    })
}

fn not_an_action(name: &str) -> QmpError {
    QmpError::generic(format!("Internal error: '{name}' is no action (bug)"))
}
