-- Shared by the scripts that append to a journal or read records; the loader puts it in front of them.

-- Append a record; the entry's id is its sequence number. Returns {sequence number, the previous record's}, the
-- latter '0' if the journal was empty. A writer may flush from memory only while it knows every previous one.
--
-- The shard's hash holds its clock and, for every thread with a journal, the journal's last sequence number. The
-- clock is a hybrid one: microseconds of Redis' time, unless that stands still or went back. 2^53 microseconds end
-- in the year 2255, so a double holds them exactly.
local function append(journal, shard, dirty, thread, payload)
  local time = redis.call('TIME')
  local now = tonumber(time[1]) * 1000000 + tonumber(time[2])
  local tail = 't:' .. thread
  local known = redis.call('HMGET', shard, 'clock', tail)
  local last = tonumber(known[1] or '0')
  if now <= last then now = last + 1 end
  local sequence = string.format('%.0f', now)
  redis.call('HSET', shard, 'clock', sequence, tail, sequence)
  redis.call('XADD', journal, sequence .. '-0', 'r', payload)
  if not known[2] then redis.call('ZADD', dirty, 'NX', sequence, thread) end
  return {sequence, known[2] or '0'}
end

-- Put off the expiry of hot state. The set of namespaces, which a delete finds the hashes by, outlives them all
-- because it is put off with each; where Redis may evict what has a TTL, it has none. Doing it ten times in a lifetime is enough; `renewed` says when it was done.
local function keep_alive(hot, namespaces, ttl, namespaces_ttl, sequence, renewed)
  if renewed and (ttl == '0' or tonumber(sequence) - tonumber(renewed) <= tonumber(ttl) * 100) then return end
  redis.call('HSET', hot, 'e', sequence)
  -- A lease may have left a short expiry behind.
  if ttl ~= '0' then redis.call('PEXPIRE', hot, ttl) else redis.call('PERSIST', hot) end
  if namespaces_ttl ~= '0' then redis.call('PEXPIRE', namespaces, namespaces_ttl) else redis.call('PERSIST', namespaces) end
end

-- Greater than the id of any checkpoint.
local any_id = '\255'

-- Names the shard's field that says up to which checkpoint writes came while nothing was hot.
local function early_mark(thread, ns)
  return 'u:' .. #thread .. ':' .. thread .. ns
end

-- Split a run of byte strings with their lengths in front.
local function unframe(bytes)
  local parts, count, at, length = {}, 0, 1, #bytes
  while at <= length do
    count = count + 1
    parts[count], at = struct.unpack('>I4c0', bytes, at)
  end
  return parts
end

-- Call a command with more arguments than Lua's stack takes; pairs stay together.
local function in_chunks(command, key, arguments)
  for first = 1, #arguments, 1000 do
    redis.call(command, key, unpack(arguments, first, math.min(first + 999, #arguments)))
  end
end
